# GPT-2's smallest size, pretrained on 10 billion tokens of FineWeb-Edu on 8 GPUs. NOT RUN by us: a
# recipe of what is known elsewhere. config/gpt2_twin.py is the same, small enough for a laptop.
#
#   pip install pyarrow huggingface_hub transformers
#   hf download HuggingFaceFW/fineweb-edu --repo-type dataset --include "sample/10BT/*" \
#       --local-dir fineweb-edu
#   hf download gpt2 tokenizer.json --local-dir gpt2
#   python data.py config/gpt2_124m.py                     # or some shards on each of many machines
#   torchrun --nproc_per_node=8 train.py config/gpt2_124m.py
#
# To expect: from modded-nanogpt (github.com/KellerJordan/modded-nanogpt), on FineWeb and 8 H100:
# llm.c with AdamW has a val loss of 3.28 after 10 billion tokens and 45 minutes, so at 3.7 million
# tokens/s. Losses on FineWeb-Edu are not those on FineWeb.
dataset = "fineweb-edu"
train_file = "fineweb-edu/sample/10BT/*.parquet"
target = "none"
tokenizer = "gpt2/tokenizer.json"
shards = 112  # 8 of each file: 180 MB of tokens each

objective = "clm"
max_len = 1024
n_layer = 12
n_head = 12
d_model = 768
mlp = "relu2"
batch_size = 512  # blocks: half a million tokens, over all GPUs
micro_batch_tokens = 65536
epochs = 1.0
optimizer = "muon"
learning_rate = 2e-3
schedule = "trapezoid"
cooldown = 0.4
warmup_steps = 250
weight_decay = 0.1
beta2 = 0.95
eval_interval = 500
save_interval = 500
