from vision_tinycap import *
