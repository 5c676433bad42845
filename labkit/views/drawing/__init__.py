"""What all views draw with: safe markup, shapes, cells, tables, and one colour per meaning."""
