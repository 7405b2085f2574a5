# The linear baseline for text: a bag of hashed words, word pairs, and runs of up to 6 bytes, with
# no order beyond them. Seconds; always worth knowing. Chosen by cross-validation on the train
# splits of three data sets (NOTES.md).
dataset = "bbc"
model = "linear"

tokenizer = "bytes"  # "words": words and word pairs only; three times as fast, 1-2 points worse
ngrams = 2  # 3 overfits small data
char_ngrams = 6
buckets = 2**20
max_len = 32768  # bytes
micro_batch_tokens = 131072
batch_size = 64
epochs = 10.0
eval_interval = 1_000_000  # only at the end, where such a model is best: with few val examples,
# chance would choose an epoch
label_smoothing = 0.05
optimizer = "adagrad"
learning_rate = 0.1
warmup_steps = 0
schedule = "linear"
weight_decay = 0.0
dtype = "float32"
