# The linear baseline for text: a bag of hashed n-grams, no order beyond them. A second or two; always worth knowing.
dataset = "bbc"
model = "linear"

ngrams = 3
max_len = 4096
batch_size = 64
epochs = 10.0
learning_rate = 0.1
warmup_steps = 0
schedule = "linear"
weight_decay = 0.0
dtype = "float32"
