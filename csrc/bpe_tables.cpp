#include "bpe_tables.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <unordered_map>
#include <unordered_set>

#include "normalizer.hpp"
#include "utf8.hpp"

namespace cpt {

namespace {

constexpr char32_t kSpace = 0x2581;
constexpr std::size_t kLowCharacters = 0x10000;
constexpr int kBitsPerJoin = 16;  // in the table of pairs: about 6 % of those that never join are taken for joins

std::u32string characters_of(std::string_view text) {
  std::u32string characters;
  const char* at = text.data();
  while (at < text.data() + text.size()) characters.push_back(utf8::decode(at));
  return characters;
}

unsigned log2_above(std::size_t count) {
  unsigned bits = 6;
  while ((std::size_t{1} << bits) < count) ++bits;
  return bits;
}

bool is_text(PieceType type) { return type == PieceType::kNormal || type == PieceType::kUnused; }

// The form in which spaces are cut: see Normalizer.
std::string spaced(std::string text) {
  for (std::size_t at; (at = text.find(kSpaceSymbol)) != std::string::npos;) {
    text.replace(at, kSpaceSymbol.size(), " ");
  }
  return text;
}

}  // namespace

BpeTables::BpeTables(const std::vector<Piece>& pieces, bool byte_fallback, bool escape_whitespaces)
    : byte_fallback_(byte_fallback), vocab_size_(pieces.size()), low_(kLowCharacters, kNoSymbol),
      pages_(0x1100, 0), merges_({}) {
  high_.emplace_back().fill(kNoSymbol);
  read_specials(pieces, escape_whitespaces);
  const std::vector<Entry> entries = read_entries(pieces, escape_whitespaces);
  const auto is_long = [](const Entry& entry) { return entry.text.size() > 1; };
  const auto long_entries = static_cast<std::size_t>(std::count_if(entries.begin(), entries.end(), is_long));
  first_character_ = static_cast<Symbol>(long_entries);
  add_character(kSpace);
  if (escape_whitespaces) low_[U' '] = low_[kSpace];
  for (const Entry& entry : entries) {
    for (const char32_t code : entry.text) add_character(code);
  }
  const std::size_t symbols = first_character_ + characters_.size();
  if (symbols > MergeTable::kMaxSymbol) throw std::invalid_argument("it has too many pieces");
  add_ranks(entries, long_entries);
  const std::vector<Merge> merges = last_merges(entries, long_entries);
  merges_ = MergeTable(merges);
  fill_joins(entries, merges);
  write_tokens(pieces, entries, merges, long_entries);
}

void BpeTables::read_specials(const std::vector<Piece>& pieces, bool escape_whitespaces) {
  std::unordered_set<std::string_view> reserved;
  std::unordered_set<std::string_view> spelt;
  for (std::size_t id = 0; id < pieces.size(); ++id) {
    const Piece& piece = pieces[id];
    if (!utf8::valid(piece.text)) throw std::invalid_argument("a piece is not valid UTF-8");
    if (piece.text.empty()) throw std::invalid_argument("its piece " + std::to_string(id) + " is empty");
    const bool in_text = is_text(piece.type) || piece.type == PieceType::kUserDefined;
    if (!(in_text ? spelt : reserved).insert(piece.text).second) {
      throw std::invalid_argument("its piece " + piece.text + " is there twice");
    }
    const auto number = static_cast<std::uint32_t>(id);
    if (piece.type == PieceType::kUnknown) unknown_ = number;
    if (piece.type == PieceType::kByte) {  // "<0x41>"
      if (piece.text.size() != 6) throw std::invalid_argument("its byte piece " + piece.text + " names no byte");
      byte_tokens_[std::strtoul(piece.text.substr(3, 2).c_str(), nullptr, 16) & 0xff] = number;
    }
    if (piece.type == PieceType::kUserDefined) {
      // A space in it is never met where spaces are escaped before the text is cut.
      if (escape_whitespaces && piece.text.find(' ') != std::string::npos) continue;
      user_defined_.add(escape_whitespaces ? spaced(piece.text) : piece.text, number);
    }
  }
  if (unknown_ == kNoSymbol) throw std::invalid_argument("it has no unknown piece");
  for (const Piece& piece : pieces) {
    if (reserved.count(piece.text) && (spelt.count(piece.text) || utf8::count(piece.text) == 1)) {
      throw std::invalid_argument("text can spell its control piece " + piece.text);
    }
  }
}

std::vector<BpeTables::Entry> BpeTables::read_entries(const std::vector<Piece>& pieces, bool escape_whitespaces) const {
  std::vector<Entry> entries;
  for (std::size_t id = 0; id < pieces.size(); ++id) {
    const Piece& piece = pieces[id];
    if (!is_text(piece.type)) continue;
    if (escape_whitespaces && piece.text.find(' ') != std::string::npos) continue;  // never met, as above
    if (!std::isfinite(piece.score)) throw std::invalid_argument("the score of a piece is not a number");
    entries.push_back({static_cast<std::uint32_t>(id), characters_of(piece.text), piece.type, piece.score});
  }
  std::stable_sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    const bool a_long = a.text.size() > 1;
    const bool b_long = b.text.size() > 1;
    return a_long != b_long ? a_long : a_long && a.score > b.score;
  });
  return entries;
}

void BpeTables::add_character(char32_t code) {
  if (character(code) != kNoSymbol) return;
  const auto symbol = static_cast<Symbol>(first_character_ + characters_.size());
  characters_.push_back(code);
  if (code < low_.size()) {
    low_[code] = symbol;
    return;
  }
  std::uint16_t& page = pages_[code >> 8];
  if (page == 0) {
    page = static_cast<std::uint16_t>(high_.size());
    high_.emplace_back().fill(kNoSymbol);
  }
  high_[page][code & 0xff] = symbol;
}

void BpeTables::add_ranks(const std::vector<Entry>& entries, std::size_t long_entries) {
  ranks_.resize(long_entries);
  for (std::size_t k = 0; k < long_entries; ++k) {
    const bool tie = k > 0 && entries[k].score == entries[k - 1].score;
    ranks_[k] = tie ? ranks_[k - 1] : static_cast<std::uint32_t>(k);
    if (tie) first_tie_ = std::min(first_tie_, ranks_[k]);
  }
}

std::vector<Merge> BpeTables::all_merges(const std::vector<Entry>& entries, std::size_t long_entries) const {
  std::unordered_map<std::u32string_view, Symbol> known;
  for (std::size_t k = 0; k < long_entries; ++k) known.emplace(entries[k].text, static_cast<Symbol>(k));
  const auto find = [&](std::u32string_view text) {
    if (text.size() == 1) return character(text[0]);
    const auto found = known.find(text);
    return found == known.end() ? kNoSymbol : found->second;
  };
  std::vector<Merge> merges;
  for (std::size_t k = 0; k < long_entries; ++k) {
    const std::u32string_view text = entries[k].text;
    for (std::size_t cut = 1; cut < text.size(); ++cut) {
      const Symbol left = find(text.substr(0, cut));
      const Symbol right = find(text.substr(cut));
      if (left != kNoSymbol && right != kNoSymbol) merges.push_back({left, right, static_cast<Symbol>(k)});
    }
  }
  return merges;
}

// The one merge that makes each piece. Merging treats a stretch of text the same way whatever stands around it,
// until something is merged across its ends; so a piece always comes about as when its text stands alone, by the
// same last merge. Every other way to put it together never happens, and a piece that is not reached never appears.
std::vector<Merge> BpeTables::last_merges(const std::vector<Entry>& entries, std::size_t long_entries) const {
  const MergeTable all(all_merges(entries, long_entries));
  std::vector<Merge> merges;
  std::vector<Symbol> symbols;
  for (std::size_t k = 0; k < long_entries; ++k) {
    symbols.clear();
    for (const char32_t code : entries[k].text) symbols.push_back(character(code));
    while (symbols.size() > 1) {
      std::size_t best = 0;
      Symbol merged = kNoSymbol;
      for (std::size_t at = 0; at + 1 < symbols.size(); ++at) {
        const Symbol pair = all.find(symbols[at], symbols[at + 1]);
        if (pair == kNoSymbol || (merged != kNoSymbol && rank(pair) >= rank(merged))) continue;
        merged = pair;
        best = at;
      }
      if (merged == kNoSymbol) break;
      if (merged == k) merges.push_back({symbols[0], symbols[1], merged});
      symbols[best] = merged;
      symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(best) + 1);
    }
  }
  return merges;
}

void BpeTables::fill_joins(const std::vector<Entry>& entries, const std::vector<Merge>& merges) {
  const auto as_cut = [&](char32_t code) { return code == kSpace && low_[U' '] == low_[kSpace] ? U' ' : code; };
  std::unordered_set<std::uint64_t> hashes;
  for (const Merge& merge : merges) {
    const std::u32string& text = entries[merge.merged].text;
    for (std::size_t at = 1; at < text.size(); ++at) {
      hashes.insert(MergeTable::hash(character(text[at - 1]), character(text[at])));
      const char32_t left = as_cut(text[at - 1]);
      const char32_t right = as_cut(text[at]);
      if (left < 128 && right < 128) ascii_joins_[left][right >> 6] |= std::uint64_t{1} << (right & 63);
    }
  }
  const unsigned bits = log2_above(hashes.size() * kBitsPerJoin);
  joins_.assign((std::size_t{1} << bits) / 64, 0);
  join_shift_ = 64 - bits;
  for (const std::uint64_t hash : hashes) {
    const std::uint64_t bit = hash >> join_shift_;
    joins_[bit >> 6] |= std::uint64_t{1} << (bit & 63);
  }
}

void BpeTables::write_tokens(const std::vector<Piece>& pieces, const std::vector<Entry>& entries,
                             const std::vector<Merge>& merges, std::size_t long_entries) {
  const std::size_t symbols = first_character_ + characters_.size();
  tokens_.assign(symbols, kNoSymbol);
  lists_.resize(symbols);
  byte_counts_.assign(symbols, 0);
  std::vector<Symbol> left(long_entries, kNoSymbol);
  std::vector<Symbol> right(long_entries, kNoSymbol);
  for (std::size_t k = 0; k < entries.size(); ++k) {
    const Entry& entry = entries[k];
    if (entry.text.size() == 1) tokens_[character(entry.text[0])] = entry.id;
    if (entry.text.size() > 1 && entry.type == PieceType::kNormal) tokens_[k] = entry.id;
  }
  for (const Merge& merge : merges) {
    if (tokens_[merge.merged] != kNoSymbol) continue;
    left[merge.merged] = merge.left;
    right[merge.merged] = merge.right;
  }
  for (std::size_t symbol = 0; symbol < symbols; ++symbol) {
    if (tokens_[symbol] != kNoSymbol) continue;
    spell(static_cast<Symbol>(symbol), left, right, lists_[symbol]);
    for (const std::uint32_t id : lists_[symbol]) byte_counts_[symbol] += pieces[id].type == PieceType::kByte;
  }
}

void BpeTables::spell(Symbol symbol, const std::vector<Symbol>& unused_left, const std::vector<Symbol>& unused_right,
                      std::vector<std::uint32_t>& ids) const {
  if (tokens_[symbol] != kNoSymbol) {
    ids.push_back(tokens_[symbol]);
  } else if (symbol < first_character_) {
    if (unused_left[symbol] == kNoSymbol) return;  // no merge makes it
    spell(unused_left[symbol], unused_left, unused_right, ids);
    spell(unused_right[symbol], unused_left, unused_right, ids);
  } else if (!byte_fallback_) {
    ids.push_back(unknown_);
  } else {
    std::string bytes;
    utf8::append(bytes, characters_[symbol - first_character_]);
    for (const char byte : bytes) ids.push_back(byte_tokens_[static_cast<unsigned char>(byte)]);
  }
}

}  // namespace cpt
