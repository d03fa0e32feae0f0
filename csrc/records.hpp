// From the bytes of corpus files to blocks of documents.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "block.hpp"

namespace cpt {

// The documents of lines of JSON: one object a line, its text at `text_field`, its name at "id" (a string, or a
// number as it is spelt). Where a field stands twice the last one counts. White lines hold nothing; a line that
// departs from JSON, is not UTF-8, has no text or is longer than `longest` bytes becomes a fault. `first_line` is
// the number of the first line; line 1 may begin with a byte order mark.
Block parse_jsonl(std::string_view data, std::string_view text_field, std::int64_t first_line, std::int64_t longest,
                  bool keep_records);

// The documents between white lines; a document that is not UTF-8, holds NUL or is too long becomes a fault.
Block parse_txt(std::string_view data, std::int64_t first_line, std::int64_t longest);

// A column of strings: row k is data[offsets[k]..offsets[k + 1]), or a hole where `valid` says so.
struct Column {
  const std::int64_t* offsets;
  std::string_view data;
  const unsigned char* valid;  // one byte a row; nullptr: no holes
};

// The documents of rows `first_row`.. of a table with columns of texts and, where there are any, of names.
Block parse_columns(const Column& texts, const std::optional<Column>& names, std::size_t rows,
                    std::string_view text_field, std::int64_t first_row, std::int64_t longest);

// Records end at every line or (`paragraphs`) at white lines. Both return an offset behind such an end:
// of the last one, or 0; of the first one, or 0.
std::size_t last_border(std::string_view data, bool paragraphs);
std::size_t first_border(std::string_view data, bool paragraphs);

// What has to stand before the bytes that follow `data`, which holds no border, for `first_border` to find the next.
std::string_view unfinished(std::string_view data, bool paragraphs);

// One JSON line a document where `keep` is set: its own line with a text of `changed` (nullopt: unchanged) put in
// the place of the old, or {"id", "text"} where there are no lines. Throws std::invalid_argument where the block
// comes from lines that were not kept.
std::string write_jsonl(const Block& block, const unsigned char* keep,
                        const std::vector<std::optional<std::string_view>>& changed);

// Sets a byte for each document whose work (its name up to '#', or its text) hashes below fraction * 2^64.
void held_out(const Block& block, double fraction, unsigned char* out);

}  // namespace cpt
