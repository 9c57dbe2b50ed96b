import { Frame } from "./frame.mjs";
import { PANELS } from "./panels/index.mjs";

new Frame(PANELS, JSON.parse(document.getElementById("data").textContent));
