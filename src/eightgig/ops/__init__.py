"""Operations: plain definitions, and fast versions that are compared with them."""
