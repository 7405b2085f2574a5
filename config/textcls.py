dataset = "bbc"
epochs = 8.0
mask_prob = 0.15
max_len = 384
n_layer = 1
