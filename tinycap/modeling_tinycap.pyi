from modeling_tinycap import *
