"""Presents results to readers: `rows` as tables, `page` as a self-contained HTML page with plots."""
