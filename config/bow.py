# The linear baseline for text: a bag of hashed words, word pairs, and runs of up to 5 bytes, no order beyond them. Seconds;
# always worth knowing. Chosen on the val splits of four data sets (NOTES.md).
dataset = "bbc"
model = "linear"

tokenizer = "bytes"  # "words": words and word pairs only, three times as fast and a point or two worse
ngrams = 2  # 3 overfits small data
max_len = 32768  # bytes
micro_batch_tokens = 131072
batch_size = 64
epochs = 6.0
learning_rate = 0.02
warmup_steps = 0
schedule = "linear"
weight_decay = 0.0
dtype = "float32"
