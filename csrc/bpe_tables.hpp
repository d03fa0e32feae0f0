// The tables of a SentencePiece BPE model: its symbols, which of them merge, and where a text may be cut.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "merge_table.hpp"
#include "prefix_set.hpp"

namespace cpt {

// The kinds of piece a model file knows.
enum class PieceType : int { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kUnused = 5, kByte = 6 };

struct Piece {
  std::string text;
  float score;
  PieceType type;
};

// Symbols of several characters come first, the best score first, so that a smaller number merges earlier.
class BpeTables {
 public:
  // Raises std::invalid_argument, with the reason, for a model that these tables cannot stand for.
  BpeTables(const std::vector<Piece>& pieces, bool byte_fallback, bool escape_whitespaces);

  // The symbol of a character; kNoSymbol where no piece holds it.
  Symbol character(char32_t code) const {
    return code < low_.size() ? low_[code] : high_[pages_[code >> 8]][code & 0xff];
  }

  // What two neighbours become; kNoSymbol where they stay two.
  Symbol merged(Symbol left, Symbol right) const { return merges_.find(left, right); }

  // Which of two merges goes first: the smaller rank; equal scores have equal ranks.
  // Below `first_tie` no two symbols are equals.
  std::uint32_t rank(Symbol symbol) const { return ranks_[symbol]; }
  Symbol first_tie() const { return first_tie_; }

  // Whether some piece may hold these two characters side by side. False is certain, true is not.
  bool joins(Symbol left, Symbol right) const {
    const std::uint64_t bit = MergeTable::hash(left, right) >> join_shift_;
    return (joins_[bit >> 6] >> (bit & 63)) & 1;
  }
  bool ascii_joins(unsigned char left, unsigned char right) const {
    return (ascii_joins_[left][right >> 6] >> (right & 63)) & 1;
  }

  // The ids a symbol is written as: `token` where it is one, otherwise kNoSymbol and `tokens`.
  std::uint32_t token(Symbol symbol) const { return tokens_[symbol]; }
  const std::vector<std::uint32_t>& tokens(Symbol symbol) const { return lists_[symbol]; }
  std::uint32_t bytes_among(Symbol symbol) const { return byte_counts_[symbol]; }  // of its tokens
  std::uint32_t byte_token(unsigned char byte) const { return byte_tokens_[byte]; }

  std::uint32_t unknown() const { return unknown_; }
  bool byte_fallback() const { return byte_fallback_; }
  std::size_t vocab_size() const { return vocab_size_; }
  const PrefixSet& user_defined() const { return user_defined_; }

 private:
  struct Entry {
    std::uint32_t id;
    std::u32string_view text;
    PieceType type;
    float score;
  };
  void read_specials(const std::vector<Piece>& pieces, bool escape_whitespaces);
  // The characters of the texts are put into `characters`.
  std::vector<Entry> read_entries(const std::vector<Piece>& pieces, bool escape_whitespaces,
                                  std::u32string& characters) const;
  void add_character(char32_t code);
  void add_ranks(const std::vector<Entry>& entries, std::size_t long_entries);
  std::vector<Merge> last_merges(const std::vector<Entry>& entries, std::size_t long_entries) const;
  void fill_joins(const std::vector<Entry>& entries, const std::vector<Merge>& merges);
  void write_tokens(const std::vector<Piece>& pieces, const std::vector<Entry>& entries,
                    const std::vector<Merge>& merges, std::size_t long_entries);
  void spell(Symbol symbol, const std::vector<Symbol>& unused_left, const std::vector<Symbol>& unused_right,
             std::vector<std::uint32_t>& ids) const;

  bool byte_fallback_;
  Symbol first_tie_ = kNoSymbol;
  std::size_t vocab_size_;
  std::uint32_t unknown_ = kNoSymbol;
  std::array<std::uint32_t, 256> byte_tokens_{};
  PrefixSet user_defined_;

  std::vector<Symbol> low_;                       // characters below U+10000
  std::vector<std::uint16_t> pages_;              // of 256 characters, for the others
  std::vector<std::array<Symbol, 256>> high_;
  std::vector<char32_t> characters_;              // of the symbols from `first_character_` on
  Symbol first_character_ = 0;

  MergeTable merges_;
  std::vector<std::uint32_t> ranks_;
  std::vector<std::uint64_t> joins_;              // one bit a hashed pair
  unsigned join_shift_ = 0;
  std::array<std::array<std::uint64_t, 2>, 128> ascii_joins_{};

  std::vector<std::uint32_t> tokens_;
  std::vector<std::vector<std::uint32_t>> lists_;
  std::vector<std::uint32_t> byte_counts_;
};

}  // namespace cpt
