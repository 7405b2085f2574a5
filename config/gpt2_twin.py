# config/gpt2_124m.py scaled down to BBC News and two cores: six minutes. With nanoGPT's
# settings instead it ends at a higher loss after the same tokens (RESULTS.md).
from gpt2_124m import *  # noqa: F403

from sources import BUILT_IN as _built_in

dataset = "bbc-text"
train_file = _built_in["bbc"]["train_file"]
encoding = _built_in["bbc"]["encoding"]
tokenizer = "bpe"
vocab_size = 8192
lowercase = False
shards = 2
val_fraction = 0.05

max_len = 256
n_layer = 4
n_head = 4
d_model = 256
batch_size = 16
micro_batch_tokens = 4096
epochs = 2.0
learning_rate = 5e-3
warmup_steps = 20
eval_interval = 300
save_interval = None
