from configuration_tinycap import *
