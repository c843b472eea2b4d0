from weights_tinycap import *
