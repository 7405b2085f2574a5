# Classifying from our own pretrained weights: python train.py config/pretrain_mlm.py && python
# finetune.py config/textcls_from_pretrain.py. The recipe of config/textcls.py, with the layers
# below learning slower than the head.
dataset = "bbc"
init_from = "out/pretrain_mlm"

pooling = "mean"
crop = 128
max_len = 512
mask_prob = 0.15
epochs = 12.0
learning_rate = 1e-3
layer_lr_decay = 0.7
