"""Reports for people: text, Markdown, HTML, and SARIF for code scanning."""
