from train_distill import *
