// The panels in the order in which they are read.

import { deep } from "./deep.mjs";
import { numbers } from "./numbers.mjs";
import { shift } from "./shift.mjs";
import { train } from "./train.mjs";

export const PANELS = [numbers, train, deep, shift];
