# A plain network on 28×28 digits. For rows of numbers: --dataset=NAME --train_file=FILE.csv
# --kind=features.
dataset = "mnist5k"
model = "mlp"

n_layer = 2
d_model = 512
dropout = 0.2
batch_size = 64
epochs = 40.0
learning_rate = 1e-3
shift = 0.08  # a digit may stand a little to the side,
rotate = 10.0  # a little tilted,
scale = 0.1  # a little smaller or larger
