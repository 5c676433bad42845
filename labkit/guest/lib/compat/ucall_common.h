/* SPDX-License-Identifier: MIT */
#include "labkit.h"
