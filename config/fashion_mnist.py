# Fashion-MNIST from scratch on a GPU (31 MB are downloaded once).
dataset = "fashion_mnist"

patch = 4  # 7×7 tokens
n_layer = 9
n_head = 6
d_model = 384
dropout = 0.1
batch_size = 512
micro_batch_tokens = 32768
epochs = 100.0
learning_rate = 1e-3
warmup_steps = 500
weight_decay = 0.05
label_smoothing = 0.1
flip = True
shift = 0.125  # 4 pixels
scale = 0.1
cutout = 0.5
mixup = 0.5
