// 2^f on [0, 1): the degree-5 polynomial with p(0) = 1 and p(1) = 2 of least maximal relative
// error (9.3e-8 exactly evaluated, 1.6e-7 in float), found by Lawson's iteration.
#pragma once

#define kExp2C1 0x1.62e4c8p-1f
#define kExp2C2 0x1.ebd8a0p-3f
#define kExp2C3 0x1.c94440p-5f
#define kExp2C4 0x1.269deep-7f
#define kExp2C5 0x1.eca6f0p-10f
