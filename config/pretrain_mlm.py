# Pretraining on text alone, by filling in masked tokens: here BBC News without its labels. For
# text of your own: --dataset=NAME --train_file=FILE.txt --target=none --lines=True. Then: python
# finetune.py config/textcls_from_pretrain.py
dataset = "bbc"

objective = "mlm"
mask_prob = 0.3  # more than BERT's 0.15: more to learn from each text (Wettig et al. 2023)
max_len = 128
n_layer = 2
n_head = 4
d_model = 128
batch_size = 32
epochs = 12.0
optimizer = "muon"
learning_rate = 3e-3
schedule = "trapezoid"
cooldown = 0.5
weight_decay = 0.0
