"""What finished cells show: paired comparisons, tables, figures, the guard and habits, and the report."""
