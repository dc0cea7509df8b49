// compact: scattered pages side by side, byte for byte. Limited by memory.
//
// Grid: parts of a page x pages threadgroups of 128 threads.

namespace forge {

// base: the pages' array; offsets: [pages] bytes, multiples of 16; out: [pages, words] of 16 bytes.
template <class Offsets>
inline void compact(const device uchar* base, Offsets offsets, int words, device uchar* out, uint3 group, uint3 groups,
                    uint thread_index) {
  const device uint4* from = (const device uint4*)(base + offsets[group.y]);
  device uint4* to = (device uint4*)out + long(group.y) * words;
  for (int i = int(group.x) * 128 + int(thread_index); i < words; i += int(groups.x) * 128) to[i] = from[i];
}

}  // namespace forge

//! body
forge::compact(base, offsets, words, out, threadgroup_position_in_grid, threadgroups_per_grid,
               thread_index_in_threadgroup);
