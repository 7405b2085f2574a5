# A character GPT on tinyshakespeare (1.1 MB, downloaded once), the data of nanoGPT's smallest
# example, with no more parameters than its CPU run has (4 layers of width 128, block 64).
# --max_steps=370 ends where that does, much sooner.
dataset = "shakespeare"
tokenizer = "bytes"
lowercase = False
test_fraction = 0.0  # val is the last tenth, as in nanoGPT

objective = "clm"
max_len = 64
n_layer = 4
n_head = 4
d_model = 128
mlp = "gelu"
d_ff = 448  # nanoGPT ties embedding and head and has fewer characters: this keeps the size equal
batch_size = 16
epochs = 1.0
optimizer = "muon"
learning_rate = 1e-2
schedule = "trapezoid"
cooldown = 0.6
warmup_steps = 10
weight_decay = 0.0
eval_interval = 500
