// The panels in the order in which they are read.

import { axes } from "./axes.mjs";
import { broken } from "./broken.mjs";
import { deep } from "./deep.mjs";
import { modes } from "./modes.mjs";
import { neighbors } from "./neighbors.mjs";
import { numbers } from "./numbers.mjs";
import { paths } from "./paths.mjs";
import { shift } from "./shift.mjs";
import { train } from "./train.mjs";
import { undo } from "./undo.mjs";
import { where } from "./where.mjs";

export const PANELS = [numbers, undo, axes, neighbors, paths, modes, train, deep, shift, broken, where];
