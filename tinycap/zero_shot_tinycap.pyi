from zero_shot_tinycap import *
