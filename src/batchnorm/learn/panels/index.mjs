// The panels in the order in which they are read.

import { numbers } from "./numbers.mjs";
import { train } from "./train.mjs";

export const PANELS = [numbers, train];
