"""Results as people read them: report pages, figures, tables in the terminal."""
