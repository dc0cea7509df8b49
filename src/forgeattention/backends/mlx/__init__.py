"""What the launchers of several backends share for MLX arrays. No backend of its own."""
