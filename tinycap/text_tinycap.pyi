from text_tinycap import *
