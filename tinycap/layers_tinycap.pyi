from layers_tinycap import *
