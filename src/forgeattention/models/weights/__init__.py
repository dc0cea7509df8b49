"""What a model's weights tell about its keys, for each framework that holds them."""
