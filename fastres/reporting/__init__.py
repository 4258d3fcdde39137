"""One self-contained HTML file about runs. Read page.py first.

page.py     the file: its sections in their order, style, both colour schemes
figures.py  charts as inline SVG, images as inline PNG
layers.py   what one network looks like inside: filters, feature maps, time and bytes a layer
"""
