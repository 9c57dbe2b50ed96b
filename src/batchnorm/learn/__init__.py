"""What learners touch and write: the page, one file made from the modules, strings and styles of this folder, and the exercises."""
