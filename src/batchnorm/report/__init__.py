"""From a result of the lab to something a person reads: `rows` for a table, `page` for a self-contained HTML page with plots."""
