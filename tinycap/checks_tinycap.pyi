from checks_tinycap import *
