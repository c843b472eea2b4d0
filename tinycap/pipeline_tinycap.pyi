from pipeline_tinycap import *
