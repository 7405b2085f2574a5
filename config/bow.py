# The linear baseline for text: a bag of hashed n-grams, no order beyond them. A second or two; always worth knowing.
dataset = "bbc"
model = "linear"

vocab_size = 2048  # tokens are short words and pieces of longer ones: with
ngrams = 4  # runs of up to four, both words in order and the insides of words are features
max_len = 4096
batch_size = 64
epochs = 6.0
learning_rate = 0.03
warmup_steps = 0
schedule = "linear"
weight_decay = 0.0
dtype = "float32"
