# The linear baseline for text: a bag of words and word pairs, no order beyond them. A few seconds; always worth knowing.
# Chosen on the val splits of four data sets (NOTES.md). Where small words tell the classes apart, as in questions, better:
# --optimizer=sgd --learning_rate=10 --grad_clip=0 --epochs=20
dataset = "bbc"
model = "linear"

tokenizer = "words"  # "bpe" with vocab_size = 2048 and ngrams = 4: the insides of words too, for languages that build them
vocab_size = 65536
ngrams = 2
max_len = 4096
batch_size = 64
epochs = 6.0
learning_rate = 0.02
warmup_steps = 0
schedule = "linear"
weight_decay = 0.0
dtype = "float32"
