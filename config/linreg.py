# Least squares: miles per gallon of 392 cars from 7 numbers. A second; ends at the closed-form
# solution.
dataset = "autompg"
model = "linear"

optimizer = "lbfgs"
batch_size = 392  # all of it in each step
epochs = 20.0  # steps
weight_decay = 0.0  # above 0: ridge regression
eval_interval = 20  # once, at the end: the solution, not a step that val prefers by chance
