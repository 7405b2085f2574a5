# A transformer for a few thousand short texts, from scratch: it reads words, hashed by their letters and neighbours, so
# that a rare word means something from its parts. Compare config/bow.py, the same features without attention.
dataset = "bbc"

tokenizer = "bytes"
stem = "words"
ngrams = 2
char_ngrams = 5
buckets = 131072
max_len = 16384  # bytes
micro_batch_tokens = 65536
n_layer = 1
d_model = 128
dropout = 0.3
label_smoothing = 0.1
epochs = 10.0
learning_rate = 1e-3
