"""Results as a page for people: one HTML file without a network, Markdown, and the raw cells as CSV.

`inputs` reads files, `rows` puts together what belongs together, `numbers` computes; `html`, `markdown` and `raw`
write.
"""
