"""Results of the bench as Markdown, CSV and figures."""
