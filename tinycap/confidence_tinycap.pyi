from confidence_tinycap import *
