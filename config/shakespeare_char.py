# A character GPT on tinyshakespeare (1.1 MB, downloaded once), the data of nanoGPT's smallest example.
dataset = "shakespeare"
tokenizer = "bytes"
lowercase = False
test_fraction = 0.0  # val is the last tenth, as in nanoGPT

objective = "clm"
max_len = 64
n_layer = 4
n_head = 4
d_model = 128
batch_size = 12
epochs = 1.0
eval_interval = 250
