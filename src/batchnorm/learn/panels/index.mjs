// The panels in the order in which they are read.

import { numbers } from "./numbers.mjs";

export const PANELS = [numbers];
