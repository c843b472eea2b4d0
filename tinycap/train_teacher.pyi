from train_teacher import *
