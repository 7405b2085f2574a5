# Handwritten digits, 4,000 to train on: the transformer of config/textcls.py on patches of 4×4
# pixels.
dataset = "mnist5k"

patch = 4  # 7×7 tokens of 16 pixels
n_layer = 4
n_head = 4
d_model = 128
batch_size = 64
epochs = 40.0
learning_rate = 1e-3
shift = 0.1  # few examples: make new ones
rotate = 15.0
scale = 0.15
