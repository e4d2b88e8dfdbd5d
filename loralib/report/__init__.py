"""What an evaluation of all ranks says: results, the choice of a rank, tables, curves and a page. Needs no torch."""
