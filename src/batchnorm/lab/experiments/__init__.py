"""One file per question: what is asked, of which data and networks, what is measured, and who claimed the answer."""
