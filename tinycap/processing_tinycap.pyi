from processing_tinycap import *
